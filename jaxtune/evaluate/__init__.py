"""How good a model is: what it answers, held against what it should answer."""
