"""The ground floor: tensor maths and segments, what models cost, and what is known of each family of them."""
