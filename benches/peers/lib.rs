//! Measures qtk against other libraries; see `benches/`.
