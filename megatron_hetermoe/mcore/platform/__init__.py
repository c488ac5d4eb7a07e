"""What megatron.training asks of the device it runs on."""
