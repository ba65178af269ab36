//! Denoisers on libtorch with diffusers' weight names and numbers
