"""Every method with some of its options: what the tests of the contract run over."""

FULL = {"vattention": {"eps": 1e-9}}
"""Options with which a method selects everything, where these are neither ``budget=1`` nor ``p=1``."""

VARIANTS = [
    "streaming:budget=0.3",
    "streaming:budget=5:sink=2",
    "longformer:budget=8:sink=2",
    "longformer:budget=0.4:sink=2:dilation=3",
    "bigbird:budget=16:block=4:first=1:recent=2",
    "bigbird:budget=0.5:block=5",
    "random:budget=0.3:sink=1:window=2",
    "random:budget=9",
    "topk:budget=0.4:sink=0:window=0",
    "topk:budget=12:gqa=max",
    "topk:budget=6:gqa=union:sink=1:window=1",
    "quest:budget=0.3:page=4",
    "quest:budget=12:page=4:gqa=max:aggregate=max",
    "quest:budget=12:page=4:gqa=union",
    "quest:budget=12:page=2:aggregate=union",
    "twilight:base=(quest:budget=0.5:page=4)",
    "twilight:base=full:p=0.7:gqa=mean:aggregate=union",
    "twilight:base=(specattn:p=0.8):p=0.7:bits=8:gqa=max",
    "twilight:base=(streaming:budget=0.6):bits=2",
    "oracle:p=0.8",
    "oracle:p=0.8:gqa=max",
    "oracle:p=0.8:gqa=union:sink=2:window=4",
    "specattn:p=0.7",
    "specattn:p=0.7:sink=0:window=0",
    "specattn:p=0.7:map=global",
    "specattn:p=0.7:map=layer",
    "specattn:p=0.7:gqa=max",
    "specattn:p=0.7:gqa=union:map=global",
    "specattn:p=0.7:aggregate=union",
    "specattn:p=0.5:granularity=page:page=4",
    "specattn-paper:p=0.7",
    "vattention:base=(topk:budget=0.1:sink=0:window=0):sink=2:window=3:least=4:eps=0.9:delta=0.9:verify=denominator",
    "vattention:base=(specattn:p=0.3):sink=1:window=0:least=3:sample=0.2:eps=0.9:verify=denominator:replacement=true",
    "vattention:base=(streaming:budget=5:sink=2):sink=0.1:window=0.2:least=5:eps=0.9:delta=0.5:verify=denominator",
]

DENSE = [
    "dense",
    "streaming:budget=1",
    "longformer:budget=1",
    "bigbird:budget=1",
    "random:budget=1",
    "topk:budget=1",
    "quest:budget=1",
    "twilight:base=full:p=1",
    "twilight:base=(quest:budget=1):p=1",
    "twilight:base=(specattn:p=1):p=1",
    "oracle:p=1",
    "specattn:p=1",
    "specattn-paper:p=1",
]
"""Every method with options under which it reads everything."""
