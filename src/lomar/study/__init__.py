"""The paper's comparisons at a scale of one's own: grids of recipes and seeds, run, judged and told in tables."""
