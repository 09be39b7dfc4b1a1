package redistest

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A server must not outlive a test binary that is killed.
func TestServerDiesWithItsParent(t *testing.T) {
	t.Parallel()
	if os.Getenv("REDISTEST_ORPHAN") == "1" {
		fmt.Println("addr " + Start(t).Addr())
		select {} // until it is killed
	}
	if !Available() {
		Start(t) // skips
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestServerDiesWithItsParent$")
	cmd.Env = append(os.Environ(), "REDISTEST_ORPHAN=1", "TMPDIR="+t.TempDir())
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	var addr string
	for lines := bufio.NewScanner(out); addr == "" && lines.Scan(); {
		addr, _ = strings.CutPrefix(lines.Text(), "addr ")
	}
	c := once(t, addr)
	require.NoError(t, c.Ping(t.Context()).Err())
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	require.Eventually(t, func() bool { return c.Ping(t.Context()).Err() != nil }, 2*time.Minute, 5*time.Millisecond)
}
