"""The lab: recipes, their execution, and sweeps over them."""
