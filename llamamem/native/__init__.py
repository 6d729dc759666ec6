"""The native runtime: pin, patch, build, find the binaries, ask them who they are."""
