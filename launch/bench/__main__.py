"""`python -m lasp.launch.bench`."""

from lasp.launch.bench import main

raise SystemExit(main())
