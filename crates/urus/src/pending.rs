//! Stand-ins for what urus-engine and urus-ring are about to provide under the same names. Goes when they land.
#![allow(missing_docs, reason = "stand-ins")]

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub start: u64,
    pub len: u64,
    pub depth: u32,
    pub present: bool,
    pub zero: bool,
    pub data: bool,
    pub compressed: bool,
    pub host: Option<u64>,
}

#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    #[error("{what}")]
    Unsupported { what: String },
}

impl EngineError {
    #[must_use]
    pub fn errno(&self) -> i32 {
        95
    }
    #[must_use]
    pub fn is_out_of_space(&self) -> bool {
        false
    }
}

#[derive(Debug)]
pub struct Buffer(Vec<u8>);

impl Buffer {
    /// `bytes` zeroed bytes in one piece.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self(vec![0; bytes])
    }
    #[must_use]
    pub fn from_vec(vec: Vec<u8>) -> Self {
        Self(vec)
    }
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.0
    }
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.0
    }
    pub fn copy_to(&self, start: usize, dst: &mut [u8]) {
        dst.copy_from_slice(&self.0[start..start + dst.len()]);
    }
    pub fn copy_from(&mut self, start: usize, src: &[u8]) {
        self.0[start..start + src.len()].copy_from_slice(src);
    }
}
