"""A training script of a user's: data, batch, loss and a flag of its own, and Megatron's ``pretrain`` for the rest.

It knows nothing of this package, and asks Megatron in the same order as Megatron-LM's scripts do.
"""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.training import get_args, get_timers, get_tokenizer, inprocess_restart, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args


def add_own_arguments(parser):
    """A weight for every second token's loss."""
    parser.add_argument_group("own").add_argument("--every-second", type=float)
    return parser


def loss_func(mask, output):
    """A mean over weighted tokens, under a name that Megatron does not know."""
    weights = mask.clone()
    weights[:, 1::2] *= get_args().every_second
    total, count = (output.float() * weights).sum(), weights.sum()
    return total, count.to(torch.int), {"weighted loss": torch.stack([total.detach(), count])}


def forward_step(data_iterator, model):
    """One microbatch."""
    timer = get_timers()("batch-generator", log_level=2)
    timer.start()
    batch = next(data_iterator)
    timer.stop()
    output = model(
        batch["tokens"].cuda(), batch["position_ids"].cuda(), None, labels=batch["labels"].cuda(),
        loss_mask=batch["loss_mask"].cuda(), packed_seq_params=None,
    )
    return output, partial(loss_func, batch["loss_mask"].cuda())


def reads_data():
    """Whether this rank builds the data, by Megatron's custom."""
    return mpu.get_tensor_model_parallel_rank() == 0


def datasets(num_samples):
    """Made-up sequences."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed + 1, sequence_length=args.seq_length, split=args.split, tokenizer=get_tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        blend=None, blend_per_split=None,
    )
    built = BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, reads_data, config).build()
    print(f"this rank has {'no ' if built[0] is None else ''}data")
    return built


if __name__ == "__main__":
    datasets.is_distributed = True
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    args = parse_and_validate_args(extra_args_provider=add_own_arguments, args_defaults={"every_second": 0.5})
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step, store=store)
