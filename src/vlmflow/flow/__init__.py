"""The paper's sections 2 and 3: where visual information flows, and what breaks when a flow is blocked."""
