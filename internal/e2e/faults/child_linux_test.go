package faults

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// A paused child process must not outlive a test binary that is killed.
func TestPausedChildDiesWithItsParent(t *testing.T) {
	t.Parallel()
	w := harness.RealWorld(t)
	if addr := os.Getenv("MESH_TEST_ORPHAN"); addr != "" {
		c := harness.StartChild(t, harness.ChildConfig{Redis: addr, Lease: 5 * time.Second})
		require.NoError(t, c.Cmd.Process.Signal(syscall.SIGSTOP))
		fmt.Println("addr " + c.Addr)
		select {} // until it is killed
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestPausedChildDiesWithItsParent$")
	cmd.Env = append(os.Environ(), "MESH_TEST_ORPHAN="+w.Real.Addr(), "TMPDIR="+t.TempDir())
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	var addr string
	for lines := bufio.NewScanner(out); addr == "" && lines.Scan(); {
		addr, _ = strings.CutPrefix(lines.Text(), "addr ")
	}
	answers := func() bool { // the kernel accepts connections for a paused process
		conn, err := net.Dial("tcp", addr)
		return err == nil && conn.Close() == nil
	}
	require.True(t, answers())
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	require.Eventually(t, func() bool { return !answers() }, 2*time.Minute, 5*time.Millisecond)
}
