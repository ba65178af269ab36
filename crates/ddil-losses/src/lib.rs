//! Distillation objectives: progressive distillation, and the formulas they are made of
