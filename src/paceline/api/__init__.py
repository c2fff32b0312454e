"""The Python surface: what ``import paceline as pl`` offers beyond the parts it is made of."""
