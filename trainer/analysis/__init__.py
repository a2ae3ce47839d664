"""What a pretrained encoder knows: analyses of its latents."""
