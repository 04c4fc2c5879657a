"""The lab: recipes, their execution, sweeps over them, reports on them."""
