"""What mechanisms are plugged into: the layer, its pass, the strip engine, routes and caches."""
