"""The ground floor: tensor maths and segments, which know no model."""
