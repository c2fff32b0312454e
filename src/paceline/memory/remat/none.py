"""Nothing is computed again.

Source: none.
Replaces: nothing, it is the default.  Needs: nothing.  Forbids: nothing.
Cost: every activation is kept from its forward pass to its backward pass.
Differs: no.
"""

from __future__ import annotations

from paceline.memory.remat.base import Remat

NONE = Remat()
