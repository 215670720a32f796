//! stub
use crate::error::Result;
use crate::storage::Storage;
use crate::worker::Worker;
/// stub
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// n
    None,
    /// l
    Leaks,
    /// a
    All,
}
/// stub
#[derive(Clone, Debug, Default)]
pub struct CheckReport {
    /// c
    pub corruptions: u64,
    /// c
    pub corruptions_fixed: u64,
    /// c
    pub check_errors: u64,
    /// c
    pub messages: Vec<String>,
}
pub(crate) async fn check<S: Storage>(
    _w: &Worker<S>,
    _h: &urus_format::Header,
    _r: Repair,
) -> Result<CheckReport> {
    Ok(CheckReport::default())
}
