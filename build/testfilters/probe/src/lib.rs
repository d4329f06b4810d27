//! A filter for tests: it does whatever its configuration says, harm included. README.md
//! beside it lists the fields.
#![cfg(target_arch = "wasm32")]

#[allow(dead_code)]
#[path = "../../../../filters/json/src/lib.rs"]
mod json;

use json::{header_name, header_value, integer, object, string, Refusal, Value};
use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};
use std::cell::Cell;
use std::rc::Rc;

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root { config: Rc::default() }));
}}

#[derive(Default)]
struct Config {
    stamps: Vec<(String, String)>,
    trap_path: Option<String>,
    refuse: Option<String>,
    spin: bool,
    grow: bool,
    once: Option<String>,
    reply: Option<(String, u32)>,
    log_on_request: Option<String>,
}

const FIELDS: [&str; 9] =
    ["stamp", "trapPath", "refuse", "spin", "grow", "once", "localReply", "logOnRequest", "env"];

fn parse(bytes: &[u8]) -> Result<Config, Refusal> {
    let mut config = Config::default();
    if bytes.is_empty() {
        return Ok(config);
    }
    let root = json::configuration(bytes)?;
    for (name, value) in object("", &root, &FIELDS)? {
        match name.as_str() {
            "stamp" => {
                object(name, value, &["header", "value"])?;
                let header = value.get("header").unwrap_or(&Value::Null);
                let text = value.get("value").unwrap_or(&Value::Null);
                let header = header_name("stamp.header", string("stamp.header", header)?)?;
                config.stamps.push((header, header_value("stamp.value", text)?.to_string()));
            }
            "trapPath" => config.trap_path = Some(string(name, value)?.to_string()),
            "refuse" => config.refuse = Some(string(name, value)?.to_string()),
            "spin" => config.spin = *value == Value::Bool(true),
            "grow" => config.grow = *value == Value::Bool(true),
            "once" => config.once = Some(string(name, value)?.to_string()),
            "localReply" => {
                object(name, value, &["path", "status"])?;
                let path = value.get("path").unwrap_or(&Value::Null);
                let status = value.get("status").unwrap_or(&Value::Null);
                let path = string("localReply.path", path)?.to_string();
                let status = integer("localReply.status", status, 200, 599)?;
                config.reply = Some((path, status as u32));
            }
            "logOnRequest" => config.log_on_request = Some(string(name, value)?.to_string()),
            _ => {
                let value = variable(string(name, value)?).unwrap_or_else(|| "(unset)".to_string());
                config.stamps.push(("x-probe-env".to_string(), value));
            }
        }
    }
    Ok(config)
}

#[link(wasm_import_module = "wasi_snapshot_preview1")]
extern "C" {
    fn environ_sizes_get(count: *mut usize, size: *mut usize) -> u32;
    fn environ_get(entries: *mut usize, buffer: *mut u8) -> u32;
}

/// A variable of the VM's environment. The standard library of this target knows none, so
/// the proxy is asked through WASI.
fn variable(name: &str) -> Option<String> {
    let (mut count, mut size) = (0, 0);
    if unsafe { environ_sizes_get(&mut count, &mut size) } != 0 {
        return None;
    }
    let mut entries = vec![0usize; count];
    let mut buffer = vec![0u8; size];
    if unsafe { environ_get(entries.as_mut_ptr(), buffer.as_mut_ptr()) } != 0 {
        return None;
    }
    buffer.split(|b| *b == 0).find_map(|entry| {
        let (key, value) = std::str::from_utf8(entry).ok()?.split_once('=')?;
        (key == name).then(|| value.to_string())
    })
}

thread_local! {
    static CONFIGURED: Cell<u32> = const { Cell::new(0) };
}

struct Root {
    config: Rc<Config>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _: usize) -> bool {
        let bytes = self.get_plugin_configuration().unwrap_or_default();
        let config = match parse(&bytes) {
            Ok(config) => config,
            Err(refusal) => {
                let _ = hostcalls::log(
                    LogLevel::Error,
                    &["probe: configuration refused: ", &refusal.0].concat(),
                );
                return false;
            }
        };
        if let Some(text) = &config.refuse {
            let _ = hostcalls::log(LogLevel::Error, text);
            return false;
        }
        if config.spin {
            let mut turns = 0u64;
            loop {
                turns = std::hint::black_box(turns.wrapping_add(1));
            }
        }
        if config.grow {
            let mut hoard: Vec<Vec<u8>> = Vec::new();
            loop {
                hoard.push(std::hint::black_box(vec![1; 1 << 20]));
            }
        }
        let before = CONFIGURED.with(|n| n.replace(n.get() + 1));
        match config.once.as_deref() {
            Some("sandbox") if before > 0 => panic!("probe: configured a second time"),
            Some("shared") if self.set_shared_data("once", Some(b"1"), Some(u32::MAX)).is_err() => {
                let _ = hostcalls::log(LogLevel::Error, "probe: another sandbox was first");
                return false;
            }
            _ => {}
        }
        self.config = Rc::new(config);
        true
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Stream { config: self.config.clone() }))
    }
}

struct Stream {
    config: Rc<Config>,
}

impl Context for Stream {}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        let path = self.get_http_request_header_bytes(":path").unwrap_or_default();
        let path = path.split(|b| *b == b'?').next().unwrap_or_default();
        if let Some(text) = &self.config.log_on_request {
            let _ = hostcalls::log(LogLevel::Info, text);
        }
        if self.config.trap_path.as_ref().is_some_and(|p| p.as_bytes() == path) {
            panic!("probe: trapped on purpose");
        }
        if let Some((at, status)) = &self.config.reply {
            if at.as_bytes() == path {
                self.send_http_response(*status, vec![("x-probe", "reply")], Some(b"probe\n"));
                return Action::Pause;
            }
        }
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        for (name, value) in &self.config.stamps {
            self.add_http_response_header(name, value);
        }
        Action::Continue
    }
}
