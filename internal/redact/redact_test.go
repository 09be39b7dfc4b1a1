package redact

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
)

func TestWithoutSecrets(t *testing.T) {
	t.Parallel()
	r := httptest.NewRequest(http.MethodGet, "http://x/ws/0123456789abcdef/room?ticket=tick%20et&n=1", nil)
	for name, value := range map[string]string{
		"Authorization": "Bearer aaaa.bbbb", "Cookie": `session="s3ss10n"; theme=dark`, "X-Api-Key": "key-1234",
		"Sec-WebSocket-Protocol": "mesh, tok3n", "User-Agent": "agent", "X-Forwarded-Proto": "https",
	} {
		r.Header.Set(name, value)
	}
	for text, want := range map[string]string{
		"session not found":                      "session not found",
		"Bearer aaaa.bbbb is old":                hidden + " is old",
		"aaaa.bbbb is old":                       hidden + " is old",
		"session s3ss10n":                        "session " + hidden,
		"no key key-1234":                        "no key " + hidden,
		"tok3n, key-1234, tick et, tick%20et":    strings.Repeat(hidden+", ", 3) + hidden,
		"mesh: of 0123456789abcdef by agent":     "mesh: of " + hidden + " by agent",
		"Get \"https://idp/a?b=c&d=e\": refused": "Get \"https://idp/a?" + hidden + "\": refused",
		"postgres://user:pass@db:1/x is away":    "postgres://" + hidden + "@db:1/x is away",
		"who is it?":                             "who is it?",
		"a\nb\x1b[1m\u202e\xff":                  "a b [1m  ",
		"n=1":                                    "n=1",
	} {
		assert.Equal(t, want, WithoutSecrets(text, r, []string{"mesh"}))
	}
	basic := httptest.NewRequest(http.MethodGet, "http://x/ws", nil)
	basic.SetBasicAuth("ann", "pass-word")
	assert.Equal(t, "wrong "+hidden+" of ann", WithoutSecrets("wrong pass-word of ann", basic, nil))
	jwt := httptest.NewRequest(http.MethodGet, "http://x/ws", nil)
	part := strings.Repeat("e", 20)
	jwt.Header.Set("Authorization", "Bearer "+part+"."+part+"1."+part+"2")
	assert.Equal(t, "claims "+hidden+": bad", WithoutSecrets("claims "+part+"1: bad", jwt, nil))
	assert.Less(t, len(WithoutSecrets(strings.Repeat("x ", 1<<20), jwt, nil)), 300)
	assert.Less(t, len(Printable(strings.Repeat("é", 1<<20))), 120)
	for _, r := range []*http.Request{{}, {Header: http.Header{"Cookie": {""}, "Authorization": {""}}, URL: &url.URL{RawQuery: "%zz;&=&"}}} {
		assert.Equal(t, "text", WithoutSecrets("text", r, nil))
	}
}

// Secrets are not shown in other forms either: cut, decoded, escaped, or quoted. Values
// that each browser sends do not hide the reason.
func TestWithoutSecretsInOtherForms(t *testing.T) {
	t.Parallel()
	request := func(header, value string) *http.Request {
		r := httptest.NewRequest(http.MethodGet, "http://x/ws", nil)
		r.Header.Set(header, value)
		return r
	}
	const odd = `s%3Aab"c/d+e=`
	k8s := "base64url.bearer." + base64.RawURLEncoding.EncodeToString([]byte("SECRET-of-a-cluster"))
	for name, c := range map[string]struct {
		r          *http.Request
		text, want string
	}{
		"quoted":           {request("Authorization", "Bearer "+odd), fmt.Sprintf("bad token %q", odd), `bad token "[hidden]"`},
		"decoded":          {request("Cookie", "sid="+odd), `no session s:ab"c/d+e=`, "no session [hidden]"},
		"decoded, quoted":  {request("Cookie", "sid="+odd), fmt.Sprintf("no session %q", `s:ab"c/d e=`), `no session "[hidden]"`},
		"in a path":        {request("Authorization", "Bearer "+odd), "GET http://idp/" + url.PathEscape(odd) + ": 404", "GET http://idp/[hidden]: 404"},
		"in a form":        {request("Authorization", "Bearer "+odd), "posted t=" + url.QueryEscape(odd), "posted t=[hidden]"},
		"base64":           {request("Sec-WebSocket-Protocol", "mesh, "+k8s), "bad SECRET-of-a-cluster", "bad [hidden]"},
		"of another URL":   {request("Referer", "https://x/y?t=SECRET-of-a-page-x"), "bad SECRET-of-a-page-x", "bad [hidden]"},
		"at sign":          {request("X", ""), "redis://u:SE@CRET@db:1: away", "redis://[hidden]@db:1: away"},
		"of the app":       {request("X", ""), "host=db password=SECRET user=x", "host=db password=[hidden] user=x"},
		"browser's words":  {request("Sec-Fetch-Dest", "empty"), "token is empty", "token is empty"},
		"browser's mode":   {request("Sec-Fetch-Mode", "websocket"), "no websocket", "no websocket"},
		"the proxy's port": {request("X-Forwarded-Port", "8443"), "dial 10.0.0.1:8443", "dial 10.0.0.1:8443"},
	} {
		assert.Equal(t, c.want, WithoutSecrets(c.text, c.r, []string{"mesh"}), name)
	}
	long := strings.Repeat("SECRET", 400) // longer than the part of an error that is searched
	for _, before := range []string{"", "the token ", strings.Repeat("x ", mostError/2-3)} {
		assert.NotContains(t, WithoutSecrets(before+long, request("Authorization", "Bearer "+long), nil), "SEC")
	}
	many := request("Cookie", strings.Repeat("a=SECRET; ", 100))
	assert.Equal(t, "bad "+hidden, WithoutSecrets("bad SECRET", many, nil), "one value, many times")
	for i := range mostSecrets + 1 {
		many.AddCookie(&http.Cookie{Name: "a", Value: fmt.Sprint("SECRET", i)})
	}
	assert.NotContains(t, WithoutSecrets("bad SECRET7 of a request", many, nil), "SECRET")
}
