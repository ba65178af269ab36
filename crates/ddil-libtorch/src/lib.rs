//! The floor under ddil: what tch does not bind of libtorch, behind a safe face
