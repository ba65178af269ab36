//! What `ddil-schedulers` promises, file by file.
