package browsertest

import (
	"context"
	"os"
	"os/exec"
	"testing"

	"github.com/chromedp/chromedp"
)

// chromium finds the browser or skips the test. With MESH_REQUIRE_BROWSER=1 it fails the
// test instead.
func chromium(t testing.TB) string {
	t.Helper()
	names := []string{"chromium", "chromium-browser", "google-chrome"}
	if name := os.Getenv("MESH_CHROMIUM"); name != "" {
		names = []string{name}
	}
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	if os.Getenv("MESH_REQUIRE_BROWSER") == "1" {
		t.Fatal("no Chromium: it is needed with MESH_REQUIRE_BROWSER=1")
	}
	t.Skip("no Chromium")
	return ""
}

// browser is one Chromium with a profile of its own: one user.
type browser struct {
	ctx context.Context
}

// newBrowser starts a browser that can reach only this machine. chromedp makes a new
// profile directory for each browser, and removes it.
func newBrowser(t testing.TB, path string) *browser {
	t.Helper()
	opts := []chromedp.ExecAllocatorOption{
		chromedp.ExecPath(path),
		chromedp.NoFirstRun,
		chromedp.NoDefaultBrowserCheck,
		chromedp.NoSandbox, // tests run as root in containers
		chromedp.DisableGPU,
		chromedp.WSURLReadTimeout(timeLimit),
		chromedp.Env("TMPDIR=" + tempDir), // Chromium leaves files there
	}
	for name, value := range map[string]any{
		"headless":                      true,
		"hide-scrollbars":               true,
		"disable-quic":                  true,
		"disable-background-networking": true,
		"disable-component-update":      true,
		"disable-default-apps":          true,
		"disable-dev-shm-usage":         true,
		"disable-extensions":            true,
		"disable-features":              "Translate,OptimizationHints,MediaRouter",
		"disable-sync":                  true,
		"force-color-profile":           "srgb",
		"host-resolver-rules":           "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
		"lang":                          "en-GB",
		"password-store":                "basic",
		// Two tabs of one browser are both in use.
		"disable-background-timer-throttling":    true,
		"disable-backgrounding-occluded-windows": true,
		"disable-renderer-backgrounding":         true,
	} {
		opts = append(opts, chromedp.Flag(name, value))
	}
	allocator, stop := chromedp.NewExecAllocator(context.Background(), opts...)
	t.Cleanup(stop)
	ctx, cancel := chromedp.NewContext(allocator)
	t.Cleanup(cancel)
	if err := chromedp.Do(ctx); err != nil {
		t.Fatalf("start %s: %v", path, err)
	}
	return &browser{ctx: ctx}
}
