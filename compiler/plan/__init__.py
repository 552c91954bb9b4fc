"""The plan: the printed form of the lowered method."""
