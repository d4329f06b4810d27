//! The decision on one request.

use crate::config::{Config, Cors};
use crate::path::protected;
use crate::table::{Table, Verdict};
use crate::token::{bare, Fault, Grant, Verifier, MISSING};
use crate::Host;
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::cell::RefCell;

/// Tokens remembered as believed, per worker.
const CACHE: usize = 1024;
/// The shared value that holds the seed of all workers.
const SEED: &str = "ratelimit/1/seed";

/// The limiter of one configuration.
pub struct Limiter {
    config: Config,
    verifier: Verifier,
    table: Table,
    /// Believed tokens by a hash of theirs, so that a user's next request costs a comparison
    /// instead of a signature check and a JSON parse.
    cache: RefCell<Vec<Option<Known>>>,
    cache_key: u64,
}

/// A believed token.
#[derive(Clone)]
struct Known {
    token: Vec<u8>,
    grant: Grant,
}

/// What becomes of a request.
#[derive(Debug, PartialEq)]
pub enum Decision<'a> {
    /// Not the limiter's business.
    Ignore,
    /// Counted, and goes on; its response is to carry `Limiter::response_headers`.
    Allow(Allowed),
    /// Answered here.
    Reply(Reply<'a>),
}

/// A request that was counted.
#[derive(Clone, Debug, PartialEq)]
pub struct Allowed {
    pub limit: u32,
    pub remaining: u32,
    pub reset: u64,
    /// The page's origin, if a browser may show it the response.
    origin: Option<String>,
}

/// An answer of the limiter's own.
#[derive(Debug, PartialEq)]
pub struct Reply<'a> {
    pub status: u32,
    pub headers: Headers<'a>,
    /// JSON, or nothing.
    pub body: String,
}

pub type Headers<'a> = Vec<(&'a str, Cow<'a, str>)>;

impl Limiter {
    pub fn new(config: Config, host: &impl Host) -> Limiter {
        let seed = seed(&config, host);
        let (low, _) = seed.split_at(8);
        Limiter {
            verifier: Verifier::new(&config, seed),
            table: Table::new(config.max_users),
            cache: RefCell::new(vec![None; CACHE]),
            cache_key: low.iter().fold(0, |key, b| key << 8 | u64::from(*b)),
            config,
        }
    }

    /// Decides on the request that the host holds.
    pub fn decide(&self, host: &impl Host) -> Decision<'_> {
        let path = host.header(":path").unwrap_or_default();
        if !protected(&self.config.paths, &path) {
            return Decision::Ignore;
        }
        let mut origin = None;
        if let Some(cors) = &self.config.cors {
            if let Some(page) = host.header("origin") {
                origin = allowed_origin(cors, page);
                if host.header(":method").as_deref() == Some(b"OPTIONS")
                    && host.header("access-control-request-method").is_some()
                {
                    return Decision::Reply(preflight(cors, origin));
                }
            }
        }
        let now = host.now();
        let grant = match host.header(&self.config.header) {
            Some(header) => self.grant(&header, now),
            None => Err(MISSING),
        };
        let grant = match grant {
            Ok(grant) => grant,
            Err(fault) => {
                let realm = "Bearer realm=\"image-hub\"";
                let challenge = match fault {
                    MISSING => Cow::from(realm),
                    fault => {
                        let text = ", error=\"invalid_token\", error_description=\"";
                        Cow::from([realm, text, fault, "\""].concat())
                    }
                };
                return self.reply(401, fault, vec![("www-authenticate", challenge)], origin);
            }
        };
        let Some(limit) = grant.limit else {
            return self.reply(403, "the plan is unknown", Vec::new(), origin);
        };
        match self.table.take(host, grant.user, limit) {
            Verdict::Pass { remaining, reset } => {
                Decision::Allow(Allowed { limit, remaining, reset, origin })
            }
            Verdict::Empty { retry, reset } => {
                let headers = self.limit_headers(limit, 0, reset);
                self.slow_down("the plan's limit is reached", retry, headers, origin)
            }
            Verdict::Busy { retry } => {
                let headers = self.limit_headers(limit, 0, retry);
                self.slow_down("too many users at this moment", retry, headers, origin)
            }
        }
    }

    /// The headers that the response of a counted request carries.
    pub fn response_headers(&self, allowed: Allowed) -> Headers<'_> {
        let mut headers = self.limit_headers(allowed.limit, allowed.remaining, allowed.reset);
        self.expose(&mut headers, allowed.origin);
        headers
    }

    fn grant(&self, header: &[u8], now: u64) -> Result<Grant, Fault> {
        let token = bare(header);
        // FNV-1a; a client that forces collisions only slows its own requests down.
        let hash = token
            .iter()
            .fold(self.cache_key, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3));
        let at = (hash >> 32) as usize % CACHE;
        if let Some(Some(known)) = self.cache.borrow().get(at) {
            if known.grant.expires > now && same(&known.token, token) {
                return Ok(known.grant);
            }
        }
        let grant = self.verifier.verify(&self.config, token, now)?;
        if let Some(slot) = self.cache.borrow_mut().get_mut(at) {
            *slot = Some(Known { token: token.to_vec(), grant });
        }
        Ok(grant)
    }

    fn limit_headers(&self, limit: u32, remaining: u32, reset: u64) -> Headers<'_> {
        let [a, b, c] = &self.config.limit_headers;
        vec![
            (a, limit.to_string().into()),
            (b, remaining.to_string().into()),
            (c, reset.to_string().into()),
        ]
    }

    fn slow_down<'a>(
        &'a self,
        error: &str,
        retry: u64,
        mut headers: Headers<'a>,
        origin: Option<String>,
    ) -> Decision<'a> {
        headers.push(("retry-after", retry.to_string().into()));
        self.reply(429, error, headers, origin)
    }

    fn reply<'a>(
        &'a self,
        status: u32,
        error: &str,
        mut headers: Headers<'a>,
        origin: Option<String>,
    ) -> Decision<'a> {
        headers.push(("content-type", "application/json".into()));
        self.expose(&mut headers, origin);
        let body = ["{\"error\":\"", error, "\"}\n"].concat();
        Decision::Reply(Reply { status, headers, body })
    }

    /// Lets a page of an allowed origin read the response.
    fn expose<'a>(&'a self, headers: &mut Headers<'a>, origin: Option<String>) {
        if let (Some(cors), Some(origin)) = (&self.config.cors, origin) {
            vary(cors, headers);
            headers.push(("access-control-allow-origin", origin.into()));
            headers.push(("access-control-expose-headers", cors.expose.as_str().into()));
        }
    }
}

/// The request's origin as the response repeats it, if that page may read the response.
fn allowed_origin(cors: &Cors, origin: Vec<u8>) -> Option<String> {
    match &cors.origins {
        None => Some("*".to_string()),
        Some(origins) => origins.iter().find(|o| o.as_bytes() == origin).cloned(),
    }
}

/// Without it a cache would show one origin the answer made for another.
fn vary(cors: &Cors, headers: &mut Headers<'_>) {
    if cors.origins.is_some() {
        headers.push(("vary", "origin".into()));
    }
}

fn preflight(cors: &Cors, origin: Option<String>) -> Reply<'_> {
    let mut headers: Headers<'_> = Vec::new();
    vary(cors, &mut headers);
    // A browser takes the answer without these headers for a no.
    if let Some(origin) = origin {
        headers.push(("access-control-allow-origin", origin.into()));
        headers.push(("access-control-allow-methods", cors.methods.as_str().into()));
        headers.push(("access-control-allow-headers", cors.headers.as_str().into()));
        headers.push(("access-control-max-age", cors.max_age.as_str().into()));
    }
    Reply { status: 204, headers, body: String::new() }
}

/// Whether two tokens are the same, in a time that tells nothing of where they differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |diff, (x, y)| diff | (x ^ y)) == 0
}

/// The seed of the users' hashes: made up by the first worker, then the same for all of
/// them and for every later configuration, so that counts stay.
fn seed(config: &Config, host: &impl Host) -> [u8; 16] {
    let mut fresh = Sha256::new();
    if let crate::Auth::Jwt(key) = &config.auth {
        fresh.update(key);
    }
    let fresh: [u8; 32] = fresh.chain_update(host.now().to_le_bytes()).finalize().into();
    let fresh: [u8; 16] = fresh.first_chunk().copied().unwrap_or_default();
    for _ in 0..3 {
        match host.load(SEED) {
            Some((value, version)) => match value.try_into() {
                Ok(seed) => return seed,
                Err(_) => host.store(SEED, &fresh, Some(version)),
            },
            None => host.store(SEED, &fresh, None),
        };
    }
    // A host without shared data: counts are one worker's own, whatever the seed.
    [0; 16]
}

#[cfg(test)]
#[path = "limiter_test.rs"]
mod tests;
