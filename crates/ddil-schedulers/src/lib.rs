//! Noise schedules, timestep grids and few-step samplers for diffusion models
