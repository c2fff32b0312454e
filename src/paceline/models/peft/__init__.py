"""Parameter-efficient fine-tuning: a few new parameters are trained, the model's own are not.

Source of the family: Han et al., Parameter-Efficient Fine-Tuning for Large Models: A Comprehensive
Survey, arXiv:2403.14608. Additive: bottleneck, prefix, prompt, ia3. Reparametrised: lora, dora.
"""

from paceline.core.registry import NameTable

PEFT = NameTable(
    "method of fine-tuning",
    {
        "none": "paceline.models.peft.none:EveryParameter",
        "lora": "paceline.models.peft.lora:Lora",
        "dora": "paceline.models.peft.dora:Dora",
        "ia3": "paceline.models.peft.ia3:Ia3",
        "bottleneck": "paceline.models.peft.bottleneck:Bottleneck",
        "prompt": "paceline.models.peft.prompt:Prompt",
        "prefix": "paceline.models.peft.prefix:Prefix",
    },
)
"""Name to its `paceline.models.peft.base.Method`."""
