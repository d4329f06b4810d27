use super::*;
use crate::table::tests::Memory;
use crate::token::tests::{encode, sign, KEY, NOW};
use std::collections::HashMap;

/// One request on a proxy's memory.
struct Request<'a> {
    memory: &'a Memory,
    headers: HashMap<&'static str, Vec<u8>>,
}

impl Host for Request<'_> {
    fn header(&self, name: &str) -> Option<Vec<u8>> {
        self.headers.get(name).cloned()
    }
    fn now(&self) -> u64 {
        self.memory.now()
    }
    fn load(&self, key: &str) -> Option<(Vec<u8>, u32)> {
        self.memory.load(key)
    }
    fn store(&self, key: &str, value: &[u8], version: Option<u32>) -> bool {
        self.memory.store(key, value, version)
    }
}

fn request<'a>(memory: &'a Memory, path: &str, headers: &[(&'static str, &str)]) -> Request<'a> {
    let mut all = HashMap::from([(":path", path.into()), (":method", b"GET".to_vec())]);
    all.extend(headers.iter().map(|(n, v)| (*n, v.as_bytes().to_vec())));
    Request { memory, headers: all }
}

fn limiter(memory: &Memory, config: &str) -> Limiter {
    Limiter::new(Config::parse(config.as_bytes()).expect("valid"), memory)
}

fn jwt_config(more: &str) -> String {
    format!(r#"{{"auth":{{"mode":"jwt","key":"{KEY}"}}{more}}}"#)
}

fn jwt(user: &str, plan: &str) -> String {
    let claims = format!(r#"{{"sub":"{user}","plan":"{plan}","exp":{}}}"#, NOW + 60);
    sign(KEY, r#"{"alg":"HS256"}"#, &claims)
}

fn status(decision: &Decision<'_>) -> u32 {
    match decision {
        Decision::Ignore => 0,
        Decision::Allow(_) => 200,
        Decision::Reply(reply) => reply.status,
    }
}

fn header<'a>(headers: &'a Headers<'_>, name: &str) -> Option<&'a str> {
    headers.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_ref())
}

#[test]
fn each_request_gets_its_status() {
    let memory = Memory::at(NOW);
    let limiter = limiter(&memory, &jwt_config(""));
    let (ann, gold) = (jwt("ann", "Personal"), jwt("ann", "Gold"));
    type Case<'a> = (&'a str, &'a [(&'static str, &'a str)], u32);
    let cases: [Case<'_>; 8] = [
        ("/auth", &[], 0),
        ("/pull", &[], 401),
        ("/pull", &[("authorization", "")], 401),
        ("/pull", &[("authorization", "Basic YTpi")], 401),
        ("/pull", &[("authorization", "Bearer rubbish")], 401),
        ("/pull", &[("authorization", &gold)], 403),
        ("/pull", &[("authorization", &ann)], 200),
        ("/p%75ll", &[], 401),
    ];
    for (path, headers, want) in cases {
        assert_eq!(
            status(&limiter.decide(&request(&memory, path, headers))),
            want,
            "{path} {headers:?}"
        );
    }
}

#[test]
fn replies_tell_the_client_what_to_do() {
    let memory = Memory::at(NOW);
    let limiter = limiter(&memory, &jwt_config(""));
    let token = jwt("ann", "Personal");
    let pull =
        |headers: &[(&'static str, &str)]| limiter.decide(&request(&memory, "/pull", headers));

    let Decision::Reply(missing) = pull(&[]) else { panic!("no token passes") };
    assert_eq!(header(&missing.headers, "www-authenticate"), Some("Bearer realm=\"image-hub\""));
    assert_eq!(missing.body, "{\"error\":\"the token is missing\"}\n");
    let Decision::Reply(bad) = pull(&[("authorization", "x")]) else {
        panic!("a bad token passes")
    };
    let challenge = header(&bad.headers, "www-authenticate").unwrap_or_default();
    assert!(challenge.contains("error=\"invalid_token\""), "{challenge}");

    let Decision::Allow(allowed) = pull(&[("authorization", &token)]) else { panic!("refused") };
    let headers = limiter.response_headers(allowed);
    assert_eq!(header(&headers, "x-ratelimit-limit"), Some("10"));
    assert_eq!(header(&headers, "x-ratelimit-remaining"), Some("9"));
    assert_eq!(header(&headers, "x-ratelimit-reset"), Some("6"));
    for _ in 0..9 {
        assert_eq!(status(&pull(&[("authorization", &token)])), 200);
    }
    let Decision::Reply(limited) = pull(&[("authorization", &token)]) else { panic!("passes") };
    assert_eq!(limited.status, 429);
    assert_eq!(header(&limited.headers, "retry-after"), Some("6"));
    assert_eq!(header(&limited.headers, "x-ratelimit-remaining"), Some("0"));
    assert_eq!(header(&limited.headers, "x-ratelimit-reset"), Some("60"));
    assert_eq!(header(&limited.headers, "content-type"), Some("application/json"));
}

#[test]
fn an_upgraded_token_passes_at_once() {
    let memory = Memory::at(NOW);
    let limiter = limiter(&memory, &jwt_config(""));
    let passed = |token: &str| {
        let request = request(&memory, "/pull", &[("authorization", token)]);
        (0..200).filter(|_| status(&limiter.decide(&request)) == 200).count()
    };
    assert_eq!(passed(&jwt("ann", "Personal")), 10);
    assert_eq!(passed(&jwt("ann", "Team")), 90);
}

#[test]
fn a_remembered_token_still_expires() {
    let memory = Memory::at(NOW);
    let limiter = limiter(&memory, &jwt_config(""));
    let token = jwt("ann", "Team");
    let request = request(&memory, "/pull", &[("authorization", &token)]);
    assert_eq!(status(&limiter.decide(&request)), 200);
    memory.pass(59.0);
    assert_eq!(status(&limiter.decide(&request)), 200);
    memory.pass(1.0);
    assert_eq!(status(&limiter.decide(&request)), 401);
}

#[test]
fn counts_outlive_a_new_configuration() {
    let memory = Memory::at(NOW);
    let token = jwt("ann", "Personal");
    let request = request(&memory, "/pull", &[("authorization", &token)]);
    for config in [jwt_config(""), jwt_config(r#","paths":["/"]"#)] {
        let limiter = limiter(&memory, &config);
        let passed = (0..5).filter(|_| status(&limiter.decide(&request)) == 200).count();
        assert_eq!(passed, 5);
    }
    assert_eq!(status(&limiter(&memory, &jwt_config("")).decide(&request)), 429);
}

#[test]
fn a_browser_page_can_ask_and_read() {
    let memory = Memory::at(NOW);
    let open = limiter(&memory, &jwt_config(""));
    let ask = [
        (":method", "OPTIONS"),
        ("origin", "https://a.example"),
        ("access-control-request-method", "GET"),
    ];
    let Decision::Reply(reply) = open.decide(&request(&memory, "/pull", &ask)) else {
        panic!("passes")
    };
    assert_eq!(reply.status, 204);
    assert_eq!(reply.body, "");
    assert_eq!(header(&reply.headers, "access-control-allow-origin"), Some("*"));
    assert_eq!(
        header(&reply.headers, "access-control-allow-headers"),
        Some("authorization, content-type")
    );
    assert_eq!(header(&reply.headers, "access-control-max-age"), Some("3600"));
    // OPTIONS alone is no preflight.
    assert_eq!(status(&open.decide(&request(&memory, "/pull", &ask[..1]))), 401);

    let Decision::Reply(reply) = open.decide(&request(&memory, "/pull", &ask[1..2])) else {
        panic!("passes")
    };
    assert_eq!(reply.status, 401);
    assert_eq!(header(&reply.headers, "access-control-allow-origin"), Some("*"));
    assert!(header(&reply.headers, "access-control-expose-headers")
        .unwrap_or_default()
        .contains("retry-after"));

    let strict = limiter(&memory, &jwt_config(r#","cors":{"origins":["https://a.example"]}"#));
    let Decision::Reply(reply) = strict.decide(&request(&memory, "/pull", &ask)) else {
        panic!("passes")
    };
    assert_eq!(header(&reply.headers, "access-control-allow-origin"), Some("https://a.example"));
    assert_eq!(header(&reply.headers, "vary"), Some("origin"));
    let other = [ask[0], ("origin", "https://b.example"), ask[2]];
    let Decision::Reply(reply) = strict.decide(&request(&memory, "/pull", &other)) else {
        panic!("passes")
    };
    assert_eq!(header(&reply.headers, "access-control-allow-origin"), None);

    let off = limiter(&memory, &jwt_config(r#","cors":false"#));
    assert_eq!(status(&off.decide(&request(&memory, "/pull", &ask))), 401);
}

/// xorshift64*: the same sequence in every run, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n.max(1)
    }
    fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most + 1)).map(|_| self.next() as u8).collect()
    }
    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..self.below(4) {
            let at = self.below(bytes.len());
            match self.below(4) {
                0 if !bytes.is_empty() => bytes[at] = self.next() as u8,
                1 => bytes.truncate(at),
                2 => bytes.insert(at, b"{}[]\",:.%/\\=\0;?"[self.below(15)]),
                _ => bytes.extend(self.bytes(8)),
            }
        }
    }
}

#[test]
fn arbitrary_requests_configurations_and_shared_data_never_panic_nor_pass_uncounted() {
    let mut random = Random(0x5eed_1234_5678_9abc);
    let seeds = [
        jwt_config(""),
        r#"{"auth":{"mode":"unsigned"},"plans":{"Personal":3},"maxUsers":5}"#.to_string(),
        r#"{"auth":{"mode":"unsigned"},"paths":["/"],"cors":{"origins":["https://a.example"]},"header":"x-t","limitHeaders":{"limit":"l"}}"#.to_string(),
    ];
    let tokens = [
        jwt("ann", "Personal"),
        jwt("ann", "Gold"),
        encode(br#"{"username":"ann","plan":"Personal"}"#),
        encode(br#"{"username":"ann"}"#),
        "Bearer ".to_string(),
    ];
    let paths = ["/pull", "/pull/x?y", "//%70ull/..", "/", "*", ""];
    let (mut accepted, mut allowed) = (0, 0);
    for _ in 0..2000 {
        let mut config = seeds[random.below(seeds.len())].clone().into_bytes();
        if random.below(3) == 0 {
            random.mutate(&mut config);
        }
        let Ok(config) = Config::parse(&config) else { continue };
        accepted += 1;
        let memory = Memory::at(NOW);
        if random.below(4) == 0 {
            memory.store("ratelimit/1/seed", &random.bytes(40), None);
            for key in 0..4 {
                memory.store(&format!("ratelimit/1/{key}"), &random.bytes(600), None);
            }
        }
        let (largest, users) = (config.plans.iter().map(|(_, l)| *l).max(), config.max_users);
        let limiter = Limiter::new(config, &memory);
        let mut passed = 0u64;
        for _ in 0..40 {
            let mut pick = |choices: &[&str]| {
                let mut value = choices[random.below(choices.len())].as_bytes().to_vec();
                if random.below(3) == 0 {
                    random.mutate(&mut value);
                }
                value
            };
            let texts: Vec<&str> = tokens.iter().map(String::as_str).collect();
            let mut headers = HashMap::from([
                (":path", pick(&paths)),
                (":method", pick(&["GET", "OPTIONS"])),
                ("authorization", pick(&texts)),
                ("x-t", pick(&texts)),
                ("origin", pick(&["https://a.example", "null"])),
                ("access-control-request-method", pick(&["GET"])),
            ]);
            let names: Vec<_> = headers.keys().copied().collect();
            for name in names {
                if random.below(5) == 0 {
                    headers.remove(name);
                }
            }
            match limiter.decide(&Request { memory: &memory, headers }) {
                Decision::Ignore => {}
                Decision::Allow(pass) => {
                    passed += 1;
                    let _ = limiter.response_headers(pass);
                }
                Decision::Reply(reply) => assert!([204, 401, 403, 429].contains(&reply.status)),
            }
        }
        allowed += passed;
        assert!(passed <= u64::from(largest.unwrap_or(0)) * u64::from(users));
    }
    assert!(accepted > 500 && allowed > 1000, "the test tests little: {accepted}, {allowed}");
}
