"""Per-example statistics: preconditions, collection, brute force, the public function."""
