"""What XLA is told about programs whose errors are held to bounds, so that they are those which users have.

Of itself the suite compiles quickly: `conftest.py`.
"""

from importlib.metadata import version
from typing import Any

AS_USERS: dict[str, Any] = {"xla_backend_optimization_level": 3}
if version("jaxlib").startswith("0.10."):
    AS_USERS |= {"xla_cpu_use_fusion_emitters": True}
