from .cluster import run_on_ray as run_on_ray
from .engine import Summary as Summary
from .engine import dry_run as dry_run
from .engine import run as run
