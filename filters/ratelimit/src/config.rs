//! The configuration: one JSON object, checked whole before it is used.

use crate::path::Prefix;
use json::{
    header_name, header_value, integer, list, members, object, string, within, Refusal, Value,
};

/// A plan's highest limit, in requests a minute; keeps the bucket's arithmetic inside u64.
const MAX_LIMIT: u64 = 1_000_000;
/// The shortest HS256 key, in bytes (RFC 7518, 3.2).
const MIN_KEY: usize = 32;

/// How the limiter works; README.md beside this crate documents every field.
pub struct Config {
    /// Requests a minute by plan.
    pub plans: Vec<(String, u32)>,
    /// The protected path prefixes.
    pub paths: Vec<Prefix>,
    pub auth: Auth,
    /// The claims that name the user and the plan.
    pub user_claim: String,
    pub plan_claim: String,
    /// The request header that carries the token, in lower case.
    pub header: String,
    /// Response headers for limit, remaining and reset.
    pub limit_headers: [String; 3],
    /// Most users remembered at a time.
    pub max_users: u32,
    /// None: the limiter knows nothing of CORS.
    pub cors: Option<Cors>,
}

/// How tokens are believed.
pub enum Auth {
    /// JWTs signed with HS256 under this key.
    Jwt(Vec<u8>),
    /// Base64 of a JSON object, believed as it stands.
    Unsigned,
}

/// What a browser is told about pages of another origin.
pub struct Cors {
    /// Allowed origins; None: every one.
    pub origins: Option<Vec<String>>,
    /// Ready values of the headers of that meaning.
    pub methods: String,
    pub headers: String,
    pub expose: String,
    pub max_age: String,
}

impl Config {
    pub fn parse(bytes: &[u8]) -> Result<Config, Refusal> {
        const FIELDS: [&str; 7] =
            ["plans", "paths", "auth", "header", "limitHeaders", "maxUsers", "cors"];
        let root = json::configuration(bytes)?;
        object("", &root, &FIELDS)?;

        let (auth, user_claim, plan_claim) = auth(root.get("auth"))?;
        let header = match root.get("header") {
            Some(value) => header_name("header", string("header", value)?)?,
            None => "authorization".to_string(),
        };
        let limit_headers = limit_headers(root.get("limitHeaders"))?;
        Ok(Config {
            plans: plans(root.get("plans"))?,
            paths: paths(root.get("paths"))?,
            cors: cors(root.get("cors"), &header, &limit_headers)?,
            auth,
            user_claim,
            plan_claim,
            header,
            limit_headers,
            max_users: match root.get("maxUsers") {
                Some(value) => integer("maxUsers", value, 1, 1_000_000)? as u32,
                None => 10_000,
            },
        })
    }

    /// The limit of a plan, in requests a minute.
    pub fn limit(&self, plan: &str) -> Option<u32> {
        self.plans.iter().find(|(name, _)| name == plan).map(|(_, limit)| *limit)
    }
}

fn auth(value: Option<&Value>) -> Result<(Auth, String, String), Refusal> {
    let Some(value) = value else {
        return Err(Refusal::new(
            "auth",
            "is missing",
            "write {\"mode\": \"jwt\", \"key\": …} or {\"mode\": \"unsigned\"}",
        ));
    };
    object("auth", value, &["mode", "key", "userClaim", "planClaim"])?;
    let mode = match value.get("mode") {
        Some(mode) => string("auth.mode", mode)?,
        None => {
            return Err(Refusal::new("auth.mode", "is missing", "write \"jwt\" or \"unsigned\""))
        }
    };
    let claim = |name: &str, default: &str| match value.get(name) {
        None => Ok(default.to_string()),
        Some(value) => match string(&within("auth", name), value)? {
            "" => Err(Refusal::new(&within("auth", name), "is empty", "name a claim")),
            claim => Ok(claim.to_string()),
        },
    };
    let plan = claim("planClaim", "plan")?;
    match (mode, value.get("key")) {
        ("jwt", Some(key)) => {
            let key = string("auth.key", key)?;
            if key.len() < MIN_KEY {
                return Err(Refusal::new(
                    "auth.key",
                    "is shorter than 32 bytes",
                    "use a random key of at least 32 bytes, the one that signs the tokens",
                ));
            }
            Ok((Auth::Jwt(key.as_bytes().to_vec()), claim("userClaim", "sub")?, plan))
        }
        ("jwt", None) => Err(Refusal::new(
            "auth.key",
            "is missing",
            "give the key that signs the tokens, at least 32 bytes",
        )),
        ("unsigned", None) => Ok((Auth::Unsigned, claim("userClaim", "username")?, plan)),
        ("unsigned", Some(_)) => Err(Refusal::new(
            "auth.key",
            "has no meaning with unsigned tokens",
            "remove it, or set auth.mode to \"jwt\"",
        )),
        _ => Err(Refusal::new("auth.mode", "is not a known mode", "write \"jwt\" or \"unsigned\"")),
    }
}

fn plans(value: Option<&Value>) -> Result<Vec<(String, u32)>, Refusal> {
    let Some(value) = value else {
        return Ok([("Personal", 10), ("Team", 100), ("Enterprise", 1000)]
            .map(|(name, limit)| (name.to_string(), limit))
            .to_vec());
    };
    let mut plans = Vec::new();
    for (name, limit) in members("plans", value)? {
        let limit = integer(&within("plans", name), limit, 1, MAX_LIMIT)?;
        plans.push((name.clone(), limit as u32));
    }
    if plans.is_empty() {
        return Err(Refusal::new("plans", "is empty", "name at least one plan and its limit"));
    }
    Ok(plans)
}

fn paths(value: Option<&Value>) -> Result<Vec<Prefix>, Refusal> {
    let Some(value) = value else {
        return Ok(vec![Prefix::default()]);
    };
    let mut paths = Vec::new();
    for (i, item) in list("paths", value)?.iter().enumerate() {
        let field = ["paths[", &i.to_string(), "]"].concat();
        paths.push(Prefix::parse(string(&field, item)?).ok_or_else(|| {
            Refusal::new(
                &field,
                "is no plain path",
                "start with /, and leave out ? # % ; \\, empty segments and dots",
            )
        })?);
    }
    if paths.is_empty() {
        return Err(Refusal::new("paths", "is empty", "name at least one path prefix"));
    }
    Ok(paths)
}

fn limit_headers(value: Option<&Value>) -> Result<[String; 3], Refusal> {
    const NAMES: [&str; 3] = ["limit", "remaining", "reset"];
    let mut headers =
        ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"].map(str::to_string);
    if let Some(value) = value {
        object("limitHeaders", value, &NAMES)?;
        for (name, header) in NAMES.iter().zip(&mut headers) {
            if let Some(value) = value.get(name) {
                let field = within("limitHeaders", name);
                *header = header_name(&field, string(&field, value)?)?;
            }
        }
    }
    Ok(headers)
}

fn cors(value: Option<&Value>, token: &str, limit: &[String; 3]) -> Result<Option<Cors>, Refusal> {
    let none = Value::Object(Vec::new());
    let value = value.unwrap_or(&none);
    if *value == Value::Bool(false) {
        return Ok(None);
    }
    object("cors", value, &["origins", "methods", "headers", "maxAge"])?;
    let texts = |name: &str| -> Result<Option<Vec<String>>, Refusal> {
        let Some(value) = value.get(name) else { return Ok(None) };
        let field = within("cors", name);
        let mut texts = Vec::new();
        for item in list(&field, value)? {
            match header_value(&field, item)? {
                text if text.is_empty() || text.contains([',', ' ']) => {
                    return Err(Refusal::new(&field, "has a bad item", "write one name an item"))
                }
                text => texts.push(text.to_string()),
            }
        }
        if texts.is_empty() {
            return Err(Refusal::new(
                &field,
                "is empty",
                "name at least one, or set cors to false",
            ));
        }
        Ok(Some(texts))
    };
    let origins = match texts("origins")? {
        Some(origins) if origins.iter().any(|o| o == "*") => None,
        Some(origins) => {
            if origins.iter().any(|o| !o.contains("://") || o.ends_with('/')) {
                return Err(Refusal::new(
                    "cors.origins",
                    "has an item that is no origin",
                    "write scheme://host[:port] without a path, or *",
                ));
            }
            Some(origins)
        }
        None => None,
    };
    let methods = texts("methods")?.map_or_else(
        || "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS".to_string(),
        |m| m.join(", "),
    );
    let headers =
        texts("headers")?.map_or_else(|| [token, ", content-type"].concat(), |h| h.join(", "));
    let max_age = match value.get("maxAge") {
        Some(value) => integer("cors.maxAge", value, 0, 86_400)?,
        None => 3600,
    };
    Ok(Some(Cors {
        origins,
        methods,
        headers,
        expose: ["retry-after", &limit[0], &limit[1], &limit[2]].join(", "),
        max_age: max_age.to_string(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "0123456789abcdef0123456789abcdef";

    fn refusal(text: &str) -> String {
        match Config::parse(text.as_bytes()) {
            Ok(_) => panic!("accepted: {text}"),
            Err(refusal) => refusal.0,
        }
    }

    #[test]
    fn defaults_are_image_hubs() {
        let text = format!(r#"{{"auth":{{"mode":"jwt","key":"{KEY}"}}}}"#);
        let config = Config::parse(text.as_bytes()).expect("valid");
        assert_eq!(config.limit("Personal"), Some(10));
        assert_eq!(config.limit("Team"), Some(100));
        assert_eq!(config.limit("Enterprise"), Some(1000));
        assert_eq!(config.limit("personal"), None);
        assert_eq!(config.paths, vec![Prefix::default()]);
        assert_eq!((config.user_claim.as_str(), config.plan_claim.as_str()), ("sub", "plan"));
        assert_eq!(config.header, "authorization");
        assert_eq!(config.max_users, 10_000);
        let cors = config.cors.expect("on by default");
        assert!(cors.origins.is_none());
        assert_eq!(cors.headers, "authorization, content-type");
    }

    #[test]
    fn everything_can_be_set() {
        let text = br#"{"plans":{"A":1,"B":1000000},"paths":["/","/v1/pull/"],
            "auth":{"mode":"unsigned","userClaim":"u","planClaim":"p"},"header":"X-Token",
            "limitHeaders":{"limit":"X-L","remaining":"X-R","reset":"X-S"},"maxUsers":1,
            "cors":{"origins":["https://a.example"],"methods":["GET"],"headers":["X-Token"],"maxAge":0}}"#;
        let config = Config::parse(text).expect("valid");
        assert_eq!(config.limit("B"), Some(1_000_000));
        assert_eq!(config.user_claim, "u");
        assert_eq!(config.header, "x-token");
        assert_eq!(config.limit_headers, ["x-l", "x-r", "x-s"].map(str::to_string));
        let cors = config.cors.expect("on");
        assert_eq!(cors.origins, Some(vec!["https://a.example".to_string()]));
        assert_eq!(cors.expose, "retry-after, x-l, x-r, x-s");
        let off = Config::parse(br#"{"auth":{"mode":"unsigned"},"cors":false}"#).expect("valid");
        assert!(off.cors.is_none());
    }

    #[test]
    fn refuses_with_field_cause_and_remedy() {
        let unsigned = r#""auth":{"mode":"unsigned"}"#;
        let cases = [
            ("{}", "auth: is missing; write"),
            (r#"{"auth":{}}"#, "auth.mode: is missing; write \"jwt\" or \"unsigned\""),
            (r#"{"auth":{"mode":"none"}}"#, "auth.mode: is not a known mode; write"),
            (r#"{"auth":{"mode":"jwt"}}"#, "auth.key: is missing; give the key"),
            (r#"{"auth":{"mode":"jwt","key":"short"}}"#, "auth.key: is shorter than 32 bytes; use"),
            (r#"{"auth":{"mode":"jwt","key":7}}"#, "auth.key: is a number; write a string"),
            (
                r#"{"auth":{"mode":"unsigned","key":"k"}}"#,
                "auth.key: has no meaning with unsigned tokens; remove it",
            ),
            (
                r#"{"auth":{"mode":"unsigned","alg":"x"}}"#,
                "auth.alg: is not a known field; use one of mode, key",
            ),
            (
                r#"{"auth":{"mode":"unsigned","userClaim":""}}"#,
                "auth.userClaim: is empty; name a claim",
            ),
            (
                &format!(r#"{{{unsigned},"plan":{{}}}}"#),
                "plan: is not a known field; use one of plans",
            ),
            (&format!(r#"{{{unsigned},"plans":{{}}}}"#), "plans: is empty; name at least one"),
            (&format!(r#"{{{unsigned},"plans":[]}}"#), "plans: is a list; write an object"),
            (
                &format!(r#"{{{unsigned},"plans":{{"A":0}}}}"#),
                "plans.A: is out of range; write a whole number from 1 to 1000000",
            ),
            (
                &format!(r#"{{{unsigned},"plans":{{"A":1.5}}}}"#),
                "plans.A: is out of range; write a whole number",
            ),
            (
                &format!(r#"{{{unsigned},"plans":{{"A":"x"}}}}"#),
                "plans.A: is a string; write a whole number",
            ),
            (
                &format!(r#"{{{unsigned},"paths":["pull"]}}"#),
                "paths[0]: is no plain path; start with /",
            ),
            (
                &format!(r#"{{{unsigned},"paths":["/a","/%70"]}}"#),
                "paths[1]: is no plain path; start with /",
            ),
            (&format!(r#"{{{unsigned},"paths":[]}}"#), "paths: is empty; name at least one"),
            (&format!(r#"{{{unsigned},"header":":path"}}"#), "header: is not a header name; use"),
            (
                &format!(r#"{{{unsigned},"maxUsers":0}}"#),
                "maxUsers: is out of range; write a whole number from 1",
            ),
            (&format!(r#"{{{unsigned},"cors":true}}"#), "cors: is a boolean; write an object"),
            (
                &format!(r#"{{{unsigned},"cors":{{"origins":["a"]}}}}"#),
                "cors.origins: has an item that is no origin; write",
            ),
            (
                &format!(r#"{{{unsigned},"cors":{{"methods":["GET, PUT"]}}}}"#),
                "cors.methods: has a bad item; write one",
            ),
        ];
        for (text, want) in cases {
            let got = refusal(text);
            assert!(got.starts_with(want), "{text}\n got {got}\nwant {want}");
            assert!(!got.contains("short\""), "the key is told: {got}");
        }
    }
}
