from __future__ import annotations

from llamamem.cli import main

if __name__ == "__main__":
    main()
