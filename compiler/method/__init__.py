"""The lowered method as data (the IR): sites, example units, loss and penalty protocols, LoweredMethod."""
