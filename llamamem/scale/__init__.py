"""Many replicas behind one URL, each a llama-server and its gateway, on Ray Serve. Needs `llamamem[scale]`."""
