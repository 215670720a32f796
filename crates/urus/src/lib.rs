//! urus
