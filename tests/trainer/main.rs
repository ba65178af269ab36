//! Tests of `ddil-trainer`, a module for each of its files.

mod dataset;
