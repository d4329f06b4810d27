//! Image Hub's limiter: so many pulls a minute for every user, by the plan in their token.
//!
//! Everything but `host` is free of the proxy: it asks for headers, the time and shared data
//! through [`Host`], so the whole decision runs in plain tests. It promises never to panic,
//! whatever a request, a configuration or the shared data holds, and never to let a request
//! pass uncounted: where it cannot count, it answers 429.

mod config;
#[cfg(target_arch = "wasm32")]
mod host;
mod limiter;
mod path;
mod table;
mod token;

pub use config::{Auth, Config, Cors};
pub use limiter::{Allowed, Decision, Limiter, Reply};
pub use table::{Table, Verdict};

/// What the limiter needs from the proxy.
pub trait Host {
    /// The value of a request header; several of one name are joined by commas.
    fn header(&self, name: &str) -> Option<Vec<u8>>;
    /// Nanoseconds since 1970.
    fn now(&self) -> u64;
    /// A value that all worker threads share, and its version.
    fn load(&self, key: &str) -> Option<(Vec<u8>, u32)>;
    /// Stores a value if its version is still the given one; None: if there is no value yet.
    /// Returns whether it was stored.
    fn store(&self, key: &str, value: &[u8], version: Option<u32>) -> bool;
}
