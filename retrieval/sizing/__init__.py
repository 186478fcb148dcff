"""How many machines a size needs, by figures that were measured."""
