"""Laws that are fitted to several runs: what data from elsewhere is worth, and what a batch size costs."""
