"""What may stand before every document: the seam of virtual tokens.

The tokens of a row's documents come after P virtual ones that all of them share: positions 0 to
P - 1 are the virtual tokens', a document's own begin at P. Virtual tokens see each other alone, so
that a document is computed as if it had them for itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from paceline.models.attention import Attend
from paceline.models.layout import Layout


class Prelude(nn.Module, ABC):
    """P virtual tokens before every document.

    Attributes:
        num_tokens: P.
    """

    num_tokens: int

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, layout: Layout, attend: Attend
    ) -> tuple[Tensor, Layout, Attend]:
        """Puts the virtual tokens before a batch.

        Args:
            x_BTD: embedded tokens, before positions are added; T may be 0.
            layout: of these tokens.
            attend: the core of attention.

        Returns:
            The same with P tokens more at the front of each row.
        """
