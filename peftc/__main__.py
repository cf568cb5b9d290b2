"""`python -m peftc`: the command line."""

from peftc.cli.main import main

raise SystemExit(main())
