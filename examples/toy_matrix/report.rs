//! stub
use crate::{options::Options, store::Store};
use ddil_examples::Result;
pub(crate) fn write(_options: &Options, store: &Store) -> Result<()> {
    println!("{} cells", store.records().len());
    Ok(())
}
