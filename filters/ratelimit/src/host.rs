//! The proxy's side of the limiter.

use crate::config::{Auth, Config};
use crate::limiter::{Allowed, Decision, Limiter};
use crate::Host;
use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel, MapType};
use std::rc::Rc;
use std::time::UNIX_EPOCH;

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root { limiter: None }));
}}

/// The proxy, on behalf of the stream it is calling about.
struct Proxy;

// Not the crate's own: those panic on any status that they do not expect.
#[link(wasm_import_module = "env")]
extern "C" {
    fn proxy_get_shared_data(
        key: *const u8,
        key_size: usize,
        value: *mut *mut u8,
        value_size: *mut usize,
        version: *mut u32,
    ) -> u32;
    fn proxy_set_shared_data(
        key: *const u8,
        key_size: usize,
        value: *const u8,
        value_size: usize,
        version: u32,
    ) -> u32;
}

/// The version that no stored value has. Zero would mean "whatever is there", and two
/// workers could then both be the first to write a value.
const ABSENT: u32 = u32::MAX;

impl Host for Proxy {
    fn header(&self, name: &str) -> Option<Vec<u8>> {
        hostcalls::get_map_value_bytes(MapType::HttpRequestHeaders, name).ok().flatten()
    }

    fn now(&self) -> u64 {
        hostcalls::get_current_time()
            .ok()
            .and_then(|time| time.duration_since(UNIX_EPOCH).ok())
            .map_or(0, |since| since.as_nanos() as u64)
    }

    fn load(&self, key: &str) -> Option<(Vec<u8>, u32)> {
        let (mut value, mut size, mut version) = (std::ptr::null_mut(), 0, 0);
        // The proxy fills memory that it took from this module's allocator, or answers with
        // another status than 0 and leaves the pointer null.
        unsafe {
            let status =
                proxy_get_shared_data(key.as_ptr(), key.len(), &mut value, &mut size, &mut version);
            if status != 0 {
                return None;
            }
            let value =
                if value.is_null() { Vec::new() } else { Vec::from_raw_parts(value, size, size) };
            Some((value, version))
        }
    }

    fn store(&self, key: &str, value: &[u8], version: Option<u32>) -> bool {
        let version = version.unwrap_or(ABSENT);
        let status = unsafe {
            proxy_set_shared_data(key.as_ptr(), key.len(), value.as_ptr(), value.len(), version)
        };
        status == 0
    }
}

struct Root {
    limiter: Option<Rc<Limiter>>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _: usize) -> bool {
        let bytes = self.get_plugin_configuration().unwrap_or_default();
        match Config::parse(&bytes) {
            Ok(config) => {
                if matches!(config.auth, Auth::Unsigned) {
                    let line =
                        "ratelimit: tokens are not signed: anyone can claim any user and plan";
                    let _ = hostcalls::log(LogLevel::Warn, line);
                }
                self.limiter = Some(Rc::new(Limiter::new(config, &Proxy)));
                true
            }
            Err(refusal) => {
                let line = ["ratelimit: configuration refused: ", &refusal.0].concat();
                let _ = hostcalls::log(LogLevel::Error, &line);
                false
            }
        }
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Stream { limiter: self.limiter.clone(), allowed: None }))
    }
}

struct Stream {
    limiter: Option<Rc<Limiter>>,
    allowed: Option<Allowed>,
}

impl Context for Stream {}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        let Some(limiter) = &self.limiter else { return Action::Continue };
        match limiter.decide(&Proxy) {
            Decision::Ignore => Action::Continue,
            Decision::Allow(allowed) => {
                self.allowed = Some(allowed);
                Action::Continue
            }
            Decision::Reply(reply) => {
                let headers = reply.headers.iter().map(|(name, value)| (*name, value.as_ref()));
                let body = (!reply.body.is_empty()).then_some(reply.body.as_bytes());
                let _ = hostcalls::send_http_response(reply.status, headers.collect(), body);
                Action::Pause
            }
        }
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        if let (Some(limiter), Some(allowed)) = (&self.limiter, self.allowed.take()) {
            for (name, value) in limiter.response_headers(allowed) {
                let value = Some(value.as_ref());
                let _ = hostcalls::set_map_value(MapType::HttpResponseHeaders, name, value);
            }
        }
        Action::Continue
    }
}
