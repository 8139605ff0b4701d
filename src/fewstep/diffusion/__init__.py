"""Pure maths of diffusion: contract, schedules, guidance, samplers and draws. Nothing here knows a network."""
