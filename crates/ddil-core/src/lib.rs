//! Training states for diffusion distillation: rollouts, mixing of sources, aggregation
