"""The studies: what scale and temperature do, each with its question, its figure, and what was found."""
