package browser

import (
	"fmt"
	"strings"
	"testing"
)

// pullOnce pulls by click and returns the newest line of the log.
func (b *tab) pullOnce() string {
	b.t.Helper()
	const lines = "document.querySelectorAll('#log li').length"
	var before int
	b.js(lines, &before)
	b.click("#pull")
	b.until(fmt.Sprintf("%s > %d && !document.querySelector('#pull').hasAttribute('aria-disabled')", lines, before), "document.body.innerText")
	return b.text("#log li")
}

// pullUntil pulls until an answer has that status. Pulls come back one by one, so on a slow machine it takes some more
// than the plan says.
func (b *tab) pullUntil(status string, most int) {
	b.t.Helper()
	for range most {
		if strings.Contains(b.pullOnce(), status) {
			return
		}
	}
	b.t.Fatalf("%d pulls, and none was answered with %s:\n%s", most, status, b.text("#log"))
}

func TestAnImageHubUserMeetsTheLimitUpgradesAndPullsOn(t *testing.T) {
	t.Parallel()
	a := newAdapter(t)
	at, _ := a.proxy("default-1", "default", a.imageHub())
	b := newTab(t)
	b.pullAndUpgrade(at, func() { a.command("", "run", "imagehub_rate_limit") }, func() { a.command("", "run", "imagehub_rate_limit", "--delete") })

	// A limiter that knows another key takes no token: the page says so and asks for the password.
	b.keys("ada" + keyTab + "lovelace" + keyEnter)
	b.shows("#who-plan", "Team")
	a.command(`{"apiVersion": "filters.meshery.io/v1alpha1", "kind": "Filter", "metadata": {"name": "other"},
		"spec": {"module": {"builtin": "ratelimit"}, "config": {"auth": {"mode": "jwt", "key": "another key of thirty-two bytes!"}}}}`, "apply", "-f", "-")
	if line := b.pullOnce(); !strings.Contains(line, "401") {
		t.Errorf("a pull with a token of another key: %s", line)
	}
	b.shows("#answer", "Log in again", "not accepted")
	var name string
	b.js("document.querySelector('#login-username').value", &name)
	if got := b.focused(); got != "login-password" || name != "ada" {
		t.Errorf("after a refused token the focus is at %q, and the name is %q", got, name)
	}
	b.clean("401", "429")
}

// pullAndUpgrade has a user meet the limit at an address, take a larger plan and pull on, with the limiter and without.
func (b *tab) pullAndUpgrade(at string, limit, lift func()) {
	t := b.t
	t.Helper()
	b.open("http://" + at + "/")
	b.named()
	b.shoot("imagehub-before")

	// Nothing limits yet, and nobody has to log in.
	if line := b.pullOnce(); !strings.Contains(line, "200") || !strings.Contains(line, "guest") {
		t.Errorf("a pull without a limiter: %s", line)
	}
	b.shows("#left", "Nothing limits pulls here")

	// With the limiter in front, pages pass and pulls need an account.
	limit()
	b.open("http://" + at + "/")
	if line := b.pullOnce(); !strings.Contains(line, "401") {
		t.Errorf("a pull as nobody: %s", line)
	}
	b.shows("#answer", "Log in first", "The token is missing")
	b.shoot("imagehub-401")

	// Signing up takes a keyboard and nothing else.
	b.tabTo("signup-username")
	b.keys("ada")
	b.keys(keyTab)
	b.keys("lovelace" + keyEnter)
	b.shows("#who", "ada", "Personal")
	if got := b.focused(); got != "pull-title" {
		t.Errorf("after the log-in the focus is at %q", got)
	}
	b.shows("#answer", "Welcome, ada")
	b.named()

	b.tabTo("pull")
	b.keys(keySpace)
	b.shows("#left", "9", "of 10 pulls a minute left")
	b.click("#pull-ten")
	b.until("!document.querySelector('#pull').hasAttribute('aria-disabled')", "document.body.innerText")
	b.pullUntil("429", 30)
	b.shows("#answer", "Limit reached", "You can pull again in", "larger plan")
	b.shows("#left", "0", "of 10")
	b.shows("#wait", "Next pull in")
	b.shoot("imagehub-429")
	// The countdown ends, and says so.
	b.shows("#answer", "You can pull again")

	// The upgrade counts at once: a further click is answered by the larger plan.
	b.pullUntil("429", 30)
	b.click("#upgrade input[value=Team]")
	b.click("#upgrade button")
	b.shows("#who-plan", "Team")
	b.shows("#answer", "Your plan is Team now")
	if line := b.pullOnce(); !strings.Contains(line, "200") || !strings.Contains(line, "ada") {
		t.Errorf("a pull after the upgrade: %s", line)
	}
	b.shows("#left", "of 100 pulls a minute left")
	b.shoot("imagehub-upgraded")

	// The limiter goes, and the same page pulls on.
	lift()
	if line := b.pullOnce(); !strings.Contains(line, "200") {
		t.Errorf("a pull after the limiter was removed: %s", line)
	}
	b.shows("#left", "Nothing limits pulls here")

	// The token was in memory only.
	var kept int
	b.js("localStorage.length + sessionStorage.length + document.cookie.length", &kept)
	if kept != 0 {
		t.Error("the page keeps something in the browser")
	}
	b.click("#logout")
	if got := b.focused(); got != "login-username" {
		t.Errorf("after the log-out the focus is at %q", got)
	}
}

func TestImageHubsFormsSayWhatIsWrongAndWhere(t *testing.T) {
	t.Parallel()
	a := newAdapter(t)
	b := newTab(t, "--force-dark-mode")
	b.open("http://" + a.imageHub() + "/")
	b.click("#signup button")
	b.shows("#signup-fault", "The user name is missing", "The password is missing")
	if got := b.focused(); got != "signup-username" {
		t.Errorf("the focus is at %q", got)
	}
	var invalid string
	b.js("[...document.querySelectorAll('[aria-invalid=true]')].map((e) => e.id).join()", &invalid)
	if invalid != "signup-username,signup-password" {
		t.Errorf("marked as invalid: %q", invalid)
	}
	b.shoot("imagehub-mistakes")

	// Text from people stays text.
	const name = `<img src=x onerror=alert(1)>`
	b.keys(name + keyTab + "secret" + keyTab + keyDown + keyEnter)
	b.shows("#who", name, "Team")
	if line := b.pullOnce(); !strings.Contains(line, name) {
		t.Errorf("the greeting is %q", line)
	}
	b.click("#logout")
	b.keys(name + keyTab + "wrong" + keyEnter)
	b.shows("#login-fault", "User name or password is wrong; check both, or sign up.")
	if got := b.focused(); got != "login-password" {
		t.Errorf("the focus is at %q", got)
	}
	b.resize(390, 900)
	b.shoot("imagehub-narrow")
	var over int
	b.js("document.documentElement.scrollWidth - document.documentElement.clientWidth", &over)
	if over > 0 {
		t.Errorf("on a telephone the page is %d pixels too wide", over)
	}
	b.clean("400", "401")
}
