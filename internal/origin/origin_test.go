package origin

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/errs"
)

func TestCompile(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		patterns []string
		yes, no  []string
	}{
		"scheme and host": {
			patterns: []string{"https://example.com"},
			yes:      []string{"https://example.com", "HTTPS://Example.COM", "https://example.com:443"},
			no: []string{"http://example.com", "https://example.com:8443", "https://a.example.com", "https://example.com.evil.net",
				"https://evil.net/https://example.com", "https://example.com/", "https://example.com@evil.net", "https://evil.net#example.com",
				"https://notexample.com", "null", "", "example.com", "https://", "://example.com", "https://example.com:"},
		},
		"subdomains": {
			patterns: []string{"https://*.example.com"},
			yes:      []string{"https://a.example.com", "https://a.b.example.com"},
			no:       []string{"https://example.com", "https://.example.com", "https://aexample.com", "https://a.example.com.evil.net", "http://a.example.com"},
		},
		"host alone": {
			patterns: []string{"Example.com"},
			yes:      []string{"https://example.com", "http://example.com", "http://example.com:80"},
			no:       []string{"http://example.com:3000", "chrome-extension://example.com"},
		},
		"ports": {
			patterns: []string{"http://localhost:3000", "127.0.0.1:*", "https://example.com:443", "other.example:443"},
			yes: []string{"http://localhost:3000", "http://127.0.0.1", "https://127.0.0.1:8443", "https://example.com",
				"https://other.example"},
			no: []string{"http://localhost", "http://localhost:3001", "https://localhost:3000", "http://other.example"},
		},
		"IPv6": {
			patterns: []string{"http://[::1]:3000", "[2001:DB8::1]"},
			yes:      []string{"http://[::1]:3000", "https://[2001:db8::1]"},
			no:       []string{"http://[::1]", "http://[::2]:3000"},
		},
		"other schemes": {
			patterns: []string{"chrome-extension://abcdef", "tauri://localhost"},
			yes:      []string{"chrome-extension://abcdef", "tauri://localhost"},
			no:       []string{"https://abcdef", "tauri://localhost:1"},
		},
		"everything": {
			patterns: []string{"*"},
			yes:      []string{"https://example.com", "null", "what is this"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			check, err := Compile(tc.patterns)
			require.NoError(t, err)
			ask := func(origins ...string) bool {
				r := httptest.NewRequest(http.MethodGet, "http://server.example/ws", nil)
				for _, o := range origins {
					r.Header.Add("Origin", o)
				}
				return check(r)
			}
			for _, o := range tc.yes {
				assert.True(t, ask(o), o)
				assert.False(t, ask(o, o), "two Origin headers")
			}
			for _, o := range tc.no {
				assert.False(t, ask(o), o)
			}
			assert.True(t, ask(), "no Origin: no browser")
		})
	}
}

func TestCompileNone(t *testing.T) {
	t.Parallel()
	check, err := Compile(nil)
	require.NoError(t, err)
	for origin, ok := range map[string]bool{
		"": true, "http://app.example.com": true, "https://APP.example.com": true,
		"http://app.example.com:81": false, "http://example.com": false, "null": false, "http://app.example.com.evil.com": false, "::": false,
	} {
		r := httptest.NewRequest(http.MethodGet, "http://app.example.com/ws", nil)
		if origin != "" {
			r.Header.Set("Origin", origin)
		}
		assert.Equal(t, ok, check(r), "%q", origin)
	}
}

// Some proxies add the default port to Host. Browsers leave it out.
func TestSameHostWithDefaultPorts(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		origin, host string
		ok           bool
	}{
		{"https://example.com", "example.com:443", true},
		{"HTTPS://example.com", "Example.com:443", true},
		{"http://example.com", "example.com:80", true},
		{"https://[::1]", "[::1]:443", true},
		{"https://[::1]", "[::1]", true},
		{"http://[::1]:8080", "[::1]:8080", true},
		{"https://example.com:8443", "example.com:8443", true},
		{"https://example.com", "example.com:80", false}, // a page on another port may belong to another user
		{"http://example.com", "example.com:443", false},
		{"https://example.com:8443", "example.com", false},
		{"https://example.com", "example.com:8443", false},
		{"https://example.com:80", "example.com", false},
		{"https://[::1]", "[::2]:443", false},
		{"chrome-extension://example.com", "example.com:443", false},
		{"https://", ":443", false},
		{"null", "null", false},
		{"", "", false},
	} {
		r := &http.Request{Host: c.host, Header: http.Header{"Origin": {c.origin}}}
		assert.Equal(t, c.ok, sameHost(r), "%s at %s", c.origin, c.host)
		r.Header.Add("Origin", c.origin)
		assert.False(t, sameHost(r), "two Origin headers: %s", c.origin)
	}
}

func TestCompileWrong(t *testing.T) {
	t.Parallel()
	for _, p := range []string{
		"", "https://", "https://example.com/", "https://example.com/path", "https://user@example.com", "example.com?x",
		"https://exa*mple.com", "https://*", "*.", "*.*.example.com", "https://*.", "https://..com", "https://.com",
		"ht tp://example.com", "://example.com", "1http://example.com", "example.com:0", "example.com:99999", "example.com:080", "example.com:",
		"null", "NULL", "::1", "[::1", "[example.com]", "https://münchen.example", "*.[::1]", "*.127.0.0.1", "exam ple.com", "*:3000",
	} {
		_, err := Compile([]string{"https://example.com", p})
		require.ErrorIs(t, err, errs.InvalidOptions, p)
		assert.ErrorContains(t, err, "AllowedOrigins[1]", p)
	}
}

func FuzzOrigin(f *testing.F) {
	for _, s := range []string{"https://example.com", "http://[::1]:80", "null", "*", "*.example.com:*", "https://a@b", "x://\x00"} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, pattern, value string) {
		check, err := Compile([]string{pattern})
		if err != nil {
			return
		}
		r := &http.Request{Header: http.Header{"Origin": {value}}}
		if check(r) && pattern != "*" {
			o, ok := parseOrigin(value)
			require.True(t, ok, "matched what is no origin")
			require.NotEmpty(t, o.host)
		}
	})
}
