//! Quality and diversity of generated samples, on features
